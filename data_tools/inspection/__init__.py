"""What data_tools.inspect measures, and the page it draws."""
