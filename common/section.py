"""Section: the base of every part of the configuration tree.

- Unknown keys are refused; values are validated when a section is built and when it is changed.
- A section holds plain data only, so it crosses processes and is written to `config.yaml` as it is.
"""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One named group of configuration keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
