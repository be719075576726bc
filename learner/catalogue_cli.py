"""Commands that print all there is of something: `metrics`, `config`."""

import typer

app = typer.Typer()


@app.command()
def metrics() -> None:
    """The metric catalogue as the Markdown table of docs/metrics.md.

    Example: diffpo metrics
    """
    from common.metrics import markdown_table

    typer.echo(markdown_table(), nl=False)


@app.command("config")
def keys() -> None:
    """Every key of the configuration as the Markdown tables of docs/configuration.md.

    Example: diffpo config
    """
    from common.config_reference import markdown_tables

    typer.echo(markdown_tables(), nl=False)
