"""The command line: one module per verb. Heavy rooms are imported when a verb runs, so that help is instant."""
