"""Training: supervised, preferences, rewards, reinforcement, and nano from scratch."""
