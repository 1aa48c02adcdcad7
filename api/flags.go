package api

import (
	"flag"

	"gapless/api/size"
)

// Flags declares the flags of the API, and of its limits. Their defaults are what c contains.
func (c *Config) Flags(fs *flag.FlagSet) {
	c.Limits.Flags(fs)
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
