"""The page on the status socket: its files, its headers, its picture of the machine, and the events that keep it live.

Imported when somebody asks for one of them, so that an agent whose page nobody opens has none of it in memory.
"""
