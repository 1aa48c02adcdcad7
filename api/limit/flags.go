package limit

import (
	"flag"

	"gapless/api/size"
)

// Flags declares the flags of the limits. Their defaults are what c contains.
func (c *Config) Flags(fs *flag.FlagSet) {
	fs.Func("trusted-proxies", "comma-separated `addresses` and ranges of proxies whose X-Forwarded-For is believed, such as 10.0.0.0/8", func(text string) (err error) {
		if c.TrustedProxies = nil; text != "" {
			c.TrustedProxies, err = ParseProxies(text)
		}
		return err
	})
	fs.IntVar(&c.Connections, "connections", c.Connections, "limit of connections of this node; 0: as many as its file descriptors allow")
	fs.IntVar(&c.CallerConnections, "caller-connections", c.CallerConnections, "limit of connections per client address (IPv6: per /64), trusted proxies excepted; 0: no limit, here and below")
	fs.IntVar(&c.Strangers, "strangers", c.Strangers, "limit of connections that have not presented a token yet, with -auth")
	fs.IntVar(&c.CallerStrangers, "caller-strangers", c.CallerStrangers, "limit of connections per client address that have not presented a token yet")
	size.Var(fs, &c.StrangerBytes, "stranger-bytes", "how many `bytes` per second and client address are read from such connections; ten times as many at once")
	fs.IntVar(&c.Viewers, "viewers", c.Viewers, "limit of viewers of this node")
	fs.IntVar(&c.CallerViewers, "caller-viewers", c.CallerViewers, "limit of viewers per caller, which is a token's subject, or else a client address")
	fs.IntVar(&c.Uploads, "uploads", c.Uploads, "limit of concurrent uploads of this node")
	fs.IntVar(&c.CallerUploads, "caller-uploads", c.CallerUploads, "limit of concurrent uploads per caller")
	fs.IntVar(&c.Answers, "answers", c.Answers, "limit of concurrent model answers of this node")
	fs.IntVar(&c.CallerAnswers, "caller-answers", c.CallerAnswers, "limit of concurrent model answers per caller")
	size.Var(fs, &c.Bodies, "bodies", "limit of `bytes` of memory for large JSON bodies on this node; each counts three times its length")
	size.Var(fs, &c.CallerBodies, "caller-bodies", "limit of `bytes` of memory for large JSON bodies per caller")
	size.Var(fs, &c.Responses, "responses", "limit of `bytes` of memory for calls in progress on this node, viewers and uploads excepted; each counts 64 KiB and the page that it holds")
	size.Var(fs, &c.CallerResponses, "caller-responses", "limit of `bytes` of memory for calls in progress per client address")
	fs.IntVar(&c.Naive, "naive", c.Naive, "limit of naive demo viewers of this node")
	fs.IntVar(&c.CallerNaive, "caller-naive", c.CallerNaive, "limit of naive demo viewers per caller")
	fs.IntVar(&c.CallerCalls, "caller-calls", c.CallerCalls, "limit of calls per second and caller; bursts may be ten times as large")
	fs.IntVar(&c.CallerAppends, "caller-appends", c.CallerAppends, "limit of appended chunks per second and caller, where each KiB counts as a chunk; bursts may be ten times as large")
	size.Var(fs, &c.CallerStored, "caller-stored", "limit of `bytes` of chunks that a caller stores per day")
	fs.IntVar(&c.CallerSessions, "caller-sessions", c.CallerSessions, "limit of new sessions per second and caller; bursts may be ten times as large")
	fs.IntVar(&c.CallerTickets, "caller-tickets", c.CallerTickets, "limit of new tickets per second and caller; bursts may be ten times as large")
}
