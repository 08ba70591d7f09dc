"""Helpers that know nothing of diffusion.

Processes
    shared_work         work shared by the processes of a launch
    process_watch       ranks that hang, and a launcher that was killed
    rendezvous          how the processes of a launch find each other
    locks               exclusive locks of files and folders

Machine and network
    backend_settings    settings of torch that change speed and last bits
    timing              calls timed in turns, and the fastest number of threads
    connection          whether the Hub answers

Files and text
    digests             digests of files, weights and JSON values
    bounded_yaml        limits of YAML that others wrote
    text                counts, durations and names in messages
    fonts               fonts for names in pictures
    first_use           names of a package that are imported on first use
"""
