"""Planning of a run before its start: parameters, memory, time, and settings that fit."""
