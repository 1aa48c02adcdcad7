package api

import (
	"flag"
	"strings"

	"gapless/api/size"
)

// Flags declares the flags of the API, and of its limits. Their defaults are what c contains.
func (c *Config) Flags(fs *flag.FlagSet) {
	c.Limits.Flags(fs)
	names := func(text string) []string {
		if text == "" {
			return nil
		}
		return strings.Split(text, ",")
	}
	fs.Func("hosts", "comma-separated `names` under which browsers may call a server on loopback, besides localhost and IP addresses", func(text string) error {
		c.Hosts = append([]string{}, names(strings.ToLower(text))...) // not nil, which is any name
		return nil
	})
	fs.Func("cors-origins", "comma-separated `origins` whose pages may call the API with credentials, such as https://chat.example", func(text string) error {
		c.Origins = names(text)
		return nil
	})
	fs.BoolVar(&c.Demo, "demo", c.Demo, "with -model demo, serve the calls by which the page cuts connections and shows a viewer that loses chunks; by default only on loopback without -auth")
	size.Var(fs, &c.ChunkMax, "chunk-max", "largest event that a chunk may become, in `bytes`")
	size.Var(fs, &c.BodyMax, "body-max", "largest JSON body in `bytes`")
	fs.IntVar(&c.BatchMax, "batch-max", c.BatchMax, "largest number of chunks in an array; half as many with producer numbers")
	size.Var(fs, &c.BatchBytes, "batch-bytes", "largest size in `bytes` of the chunks of an array, unless it is a single chunk")
	size.Var(fs, &c.URLMax, "url-max", "longest URL in `bytes`")
	size.Var(fs, &c.HeaderMax, "header-max", "largest request header in `bytes`")
	fs.DurationVar(&c.BodyTimeout, "body-timeout", c.BodyTimeout, "how long 64 KiB of a JSON body, or all of a shorter one, may take")
	size.Var(fs, &c.ContextMax, "model-context", "how many `bytes` of the conversation are sent with a question; the newest messages are kept")
	size.Var(fs, &c.AnswerMax, "model-answer-max", "longest answer in `bytes` of text")
}
