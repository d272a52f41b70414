"""The parts of bench/train_vit.py: options, network, data, penalties, checkpoints, memory, the loop."""
