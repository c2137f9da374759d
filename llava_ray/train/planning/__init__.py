"""What a run will take, before it starts: parameters, memory, time, and settings that fit."""
