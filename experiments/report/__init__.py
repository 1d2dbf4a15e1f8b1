"""Tables, figures and Markdown of an experiment."""
