"""What runs have shown, and how sure that is: pure statistics, and the readers of what runs leave behind."""
