"""What runs in a guest whose mains fail again and again."""
