"""The page on the status socket: its files, its headers, its picture of the machine, and the events that keep it live.

Imported at the first request for one of them, so that an agent whose page is never opened has none of it in memory.
"""
