"""Parts that several programs share: stages, training, data and reports."""
