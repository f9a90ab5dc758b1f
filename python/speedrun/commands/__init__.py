"""One file a verb of `speedrun`: add_arguments(parser), run(args) -> exit code."""
