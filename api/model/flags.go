package model

import "flag"

// Flags declares the flags of the model. Their defaults are what c contains.
func (c *Config) Flags(fs *flag.FlagSet) {
	fs.StringVar(&c.Kind, "model", c.Kind, "what answers questions: demo, which has a few built-in texts, or openai, a service with the chat-completions API; -model-url implies openai")
	fs.StringVar(&c.URL, "model-url", c.URL, "base `URL` of the model's API, such as https://api.openai.com/v1; the API key is read from the environment variable "+KeyVariable)
	fs.StringVar(&c.Name, "model-name", c.Name, "`name` of the model to request")
	fs.StringVar(&c.Options, "model-options", c.Options, "additional members of each model request, a `JSON` object such as {\"temperature\":0.2}; null removes a member")
	fs.DurationVar(&c.Timeout, "model-timeout", c.Timeout, "how long the model may be silent before its first word")
	fs.DurationVar(&c.Stall, "model-stall", c.Stall, "how long the model may be silent between two words")
}
