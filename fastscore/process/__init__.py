"""The forward process and the network trained on it: schedules, predictions, conditions, masks, and the call itself."""
