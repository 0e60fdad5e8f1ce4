"""What a forward is made of: attention, packed linear layers, and how compiled functions are built and chosen."""
