"""What a recipe needs, by arithmetic alone: memory, time, and the settings that fit."""
