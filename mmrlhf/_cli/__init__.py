"""Parts of `mmrlhf.cli`: a module a command that has many options. Importing them imports nothing heavy."""
