package store

import (
	"flag"

	"gapless/api/size"
)

// Flags declares the flags of what is stored, and where. Their defaults are what c contains.
func (c *Config) Flags(fs *flag.FlagSet) {
	fs.StringVar(&c.Redis, "redis", c.Redis, "`URL`: redis://…, redis+sentinel://…/master, redis+cluster://…, with rediss for TLS; or embedded:DIR: in this process, for one node, with its data in a directory; or embedded: in memory only")
	fs.StringVar(&c.Prefix, "prefix", c.Prefix, "`text` at the start of every key and channel in Redis; deployments that share a Redis server need different prefixes, even in different databases")
	fs.StringVar(&c.RedisCA, "redis-ca", c.RedisCA, "`file` with the CA certificates for a rediss:// server, instead of the system's")
	fs.StringVar(&c.RedisCert, "redis-cert", c.RedisCert, "`file` with the certificate that this node shows to Redis")
	fs.StringVar(&c.RedisKey, "redis-key", c.RedisKey, "`file` with the private key of -redis-cert")
	fs.IntVar(&c.WaitReplicas, "wait-replicas", c.WaitReplicas, "how many replicas must have an append before it is acknowledged")
	fs.DurationVar(&c.WaitTimeout, "wait-timeout", c.WaitTimeout, "how long replicas may take; after that the outcome of the append is unknown")
	fs.DurationVar(&c.HistoryTTL, "history-ttl", c.HistoryTTL, "how long a log is kept after its last use; viewing a log is using it")
	fs.IntVar(&c.HistoryMax, "history-max", c.HistoryMax, "how many chunks of a log are kept")
	size.Var(fs, &c.HistoryBytes, "history-bytes", "how many `bytes` of chunks of a log are kept; 0: no limit but -history-max")
	fs.DurationVar(&c.Grace, "grace", c.Grace, "how long a message stays unfinished after its node died, or after the connection of a producer with numbers broke")
	fs.StringVar(&c.HistoryOrder, "history-order", c.HistoryOrder, "the end of the list to which foreign producers push: oldest-first (RPUSH) or newest-first (LPUSH)")
	fs.IntVar(&c.NamesMax, "session-names", c.NamesMax, "limit of messages and producers per session")
}
