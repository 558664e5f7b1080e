"""Libraries of an artifact on this machine's processor: which of them it runs, and how programs call them."""
