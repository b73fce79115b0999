"""How good a separation is: metrics, scores of songs, tables, tuning."""
