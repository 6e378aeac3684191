"""The loop that trains students and teachers: batches, optimiser, precision, evaluation."""
