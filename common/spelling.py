"""Spelling: the patterns that texts of the configuration must match, with what a refusal says of them in words."""

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
LABEL = r"^[A-Za-z0-9]([A-Za-z0-9_./-]{0,250}[A-Za-z0-9])?$"
PROJECT = r"^[^/\\#?%:]+$"
OBJECT = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"

IN_WORDS = {
    RUN_NAME: "takes at most 63 letters, digits, '_', '.' and '-', a letter or digit first, such as sudoku-2",
    LABEL: "takes at most 252 letters, digits, '_', '.', '/' and '-', a letter or digit at both ends, such as gpu/h100",
    PROJECT: "takes no '/', '\\', '#', '?', '%' and ':'",
    OBJECT: "takes module:object, such as my_rewards:score for `def score` in my_rewards.py",
}
