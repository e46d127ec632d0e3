"""The jobs that a user meets in order: pretrain or retrofit, learn, compare; and what every run is told and leaves."""
