"""Other libraries' models on our experts."""
