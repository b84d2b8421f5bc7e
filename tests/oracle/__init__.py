"""What the tests compare puna with: tiny checkpoints, and a plain float64 model of Llama 4."""
