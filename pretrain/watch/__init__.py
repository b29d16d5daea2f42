"""Where every rank is: a heartbeat file for each, a report when one stands still, an end when it stays so."""
