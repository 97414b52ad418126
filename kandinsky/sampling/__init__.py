"""From noise to latents: the schedule, guidance, Euler's steps, and what a sample is conditioned on."""
