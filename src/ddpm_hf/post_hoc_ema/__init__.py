"""Post-hoc EMA (2312.02696): the length of the weight average is chosen after training.

profiles    the mathematics: profiles, running averages, least-squares weights
snapshots   the files that training writes
models      `PostHocEMA`: pipelines and model folders with an average of any length
"""
