"""The learning side: surrogate, objective, optimizer step, warm start, controller, command line."""
