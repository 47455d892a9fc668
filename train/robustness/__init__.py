"""How well networks stand adversarial images: the paper's Tables 7 and 8, on any operator."""
