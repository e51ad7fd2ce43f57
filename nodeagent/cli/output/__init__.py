"""How answers look: tables that fit the terminal, the forms of -o, colour, filters, order."""
