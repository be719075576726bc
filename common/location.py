"""Location: the path or URI of a file or folder, as text; `common.place` looks at what is there."""


def is_uri(where: str) -> bool:
    return "://" in where


def below(where: str, name: str) -> str:
    """Path or URI of what lies in a folder; a URI's options stay at its end."""
    base, mark, options = parted(where)
    return f"{base}/{name}{mark}{options}"


def above(where: str) -> tuple[str, str]:
    """Path or URI of the folder that something lies in, and its name there."""
    base, mark, options = parted(where)
    parent, _, name = base.rpartition("/")
    return f"{parent}{mark}{options}", name


def parted(where: str) -> tuple[str, str, str]:
    """What comes before a URI's options, without slashes at its end, the question mark, and the options."""
    base, mark, options = where.partition("?") if is_uri(where) else (where, "", "")
    return base.rstrip("/"), mark, options
