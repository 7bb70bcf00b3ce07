"""What is said before it costs: machine checks and previews."""
