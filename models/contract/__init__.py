"""The rooms of the contract that `models.base` joins: files, conditions, inference."""
