"""Motion: clocks, mailboxes, actors, the committer, the supervisor of running code, the feed of events."""
