package sse

import (
	"flag"

	"gapless/api/size"
)

// Flags declares the flags of delivery. Their defaults are what c contains.
func (c *Config) Flags(fs *flag.FlagSet) {
	fs.StringVar(&c.Node, "node", c.Node, "`name` of this node in the welcome event and in logs")
	fs.DurationVar(&c.Heartbeat, "heartbeat", c.Heartbeat, "longest silence on a stream")
	fs.DurationVar(&c.Reconcile, "reconcile", c.Reconcile, "how often a watched log is read when nothing is announced; this is the longest delay of a chunk while Redis works")
	fs.DurationVar(&c.Linger, "linger", c.Linger, "how long a log stays in memory after its last viewer has left")
	fs.DurationVar(&c.WriteTimeout, "write-timeout", c.WriteTimeout, "how long a viewer may read nothing before its connection is closed; for other responses at most 45s")
	size.Var(fs, &c.Window, "window", "how many `bytes` of a log's events are kept in memory")
	size.Var(fs, &c.WindowTotal, "window-total", "how many `bytes` of events of all logs are kept in memory")
	size.Var(fs, &c.SnapshotMax, "snapshot-max", "largest snapshot in `bytes`; the rest of a longer log is sent as chunks; 0: no snapshots")
	fs.IntVar(&c.Feeds, "feeds", c.Feeds, "limit of logs that are watched at the same time")
	fs.BoolVar(&c.Plain, "plain", c.Plain, "serve streams through the HTTP server instead of taking over HTTP/1.1 connections; slower, for comparison")
}
