"""Tests of the verbs that install and repair."""
