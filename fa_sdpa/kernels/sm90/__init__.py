"""Hopper kernels: TMA, WGMMA, warp specialisation."""
