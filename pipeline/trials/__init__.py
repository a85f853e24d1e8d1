"""What a search is made of: its board, the trials' configurations, records and tracking, the winner, the result."""
