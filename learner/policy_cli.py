"""Commands on one policy: `generate`, `convert`, `export`."""

from pathlib import Path
from typing import Annotated

import typer

from learner.options import POLICY

app = typer.Typer()


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help=POLICY)],
    prompt: Annotated[str, typer.Argument(help="What to complete.")],
    tokens: Annotated[int | None, typer.Option(help="Length of the completion; else that of its run, or 16.")] = None,
    block: Annotated[int | None, typer.Option(help="Block length; a divisor of the tokens.")] = None,
    rule: Annotated[str, typer.Option(help="Reveal rule, a name of docs/engine.md.")] = "entropy_bound",
    threshold: Annotated[float | None, typer.Option(help="The rule's parameter; else the learned threshold.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    cache: Annotated[str, typer.Option(help="none, prefix or dual.")] = "none",
    device: Annotated[str, typer.Option(help="torch device.")] = "cpu",
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the tokenizer's chat template.")] = False,
    steps: Annotated[bool, typer.Option(help="Show the completion appear step by step.")] = True,
    mask_token: Annotated[str | None, typer.Option(help="MASK, where the folder does not name it.")] = None,
) -> None:
    """One completion, how it appears, and what it cost (NFE, tokens per forward).

    Example: diffpo generate runs/sudoku/checkpoints/step-000120 "0100300103042403"
    """
    from common.local_copy import local_copy
    from learner.generation import Choice, usual_tokens
    from learner.generation import generate as run
    from learner.text_console import text_console

    folder = local_copy(model)
    choice = Choice(
        prompt=prompt,
        tokens=usual_tokens(folder) if tokens is None else tokens,
        block=block,
        rule=rule,
        threshold=threshold,
        temperature=temperature,
        seed=seed,
        cache=cache,
        device=device,
        raw=raw,
        mask_token=mask_token,
    )
    run(folder, choice, text_console(soft_wrap=True), show_steps=steps)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint of a family of docs/models.md, as it is published.")],
    target: Annotated[Path, typer.Argument(help="Folder to be made, in Hugging Face layout.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; else what each parameter has.")
    ] = None,
    shift: Annotated[
        int | None, typer.Option(help="1 where position l is predicted at column l-1; else the family's.", min=0, max=1)
    ] = None,
    mask_token: Annotated[str | None, typer.Option(help="MASK, where the folder does not name it.")] = None,
) -> None:
    """A checkpoint as a standard Hugging Face folder, shard by shard, and what was recognised.

    Example: diffpo convert LLaDA-8B-Instruct llada --dtype bfloat16
    """
    from common.conversion import convert as run
    from learner.conversion_display import lines

    found = run(source, target, dtype=dtype, shift=shift, mask_token=mask_token)
    for line in lines(found):
        typer.echo(line)
    typer.echo(f"model: {target}")


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help=POLICY)],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Add an adapter to its base; else it is written alone.")
    ] = False,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16, of the written weights.")] = "float32",
    mask_token: Annotated[str | None, typer.Option(help="MASK, where the folder does not name it.")] = None,
) -> None:
    """A policy as a plain Hugging Face folder, for other programs: model or adapter, and tokenizer.

    Example: diffpo export runs/sudoku/checkpoints/step-000120 sudoku-plain
    """
    from common.local_copy import local_copy
    from learner.export import export as run

    typer.echo(run(local_copy(checkpoint), out, merge=merge, precision=precision, mask_token=mask_token))
