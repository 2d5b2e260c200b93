"""What samples say about models: windows of text, losses on them with paired intervals, tables and pictures."""
