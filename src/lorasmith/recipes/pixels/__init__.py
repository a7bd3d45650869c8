"""A policy from raw pixels, in two phases: an autoencoder learns to see, then PPO learns to play.

In the second phase the encoder is frozen, adapted through LoRA, trained whole, or learned from nothing;
every way is one arm of the same experiment. `docs/pixels.md` says what came out.
"""
