"""Pure maths: rewards to advantages, log-probs to losses. Nothing but torch."""
