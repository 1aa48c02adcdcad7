package model

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	tmaxmax "github.com/tmaxmax/go-sse"

	"gapless/sse"
)

// served is a stream in a form that a service documents, or that its users reported, with a text of
// ours. At ⏹ the answer is complete, whatever happens to the rest.
type served struct {
	stream               string
	thought, text, calls string // calls: index, name, and arguments, as pieces are joined
	finish, usage        string
	fails                error // the error of the whole stream
	claims               bool  // its finish is only a claim
}

// services are keyed by name, and by what is hard about them.
var services = map[string]served{
	"OpenAI: an empty role, obfuscation, usage at the end": {
		stream: `data: {"id":"c","object":"chat.completion.chunk","model":"m","service_tier":"default","choices":[{"index":0,"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":"x9"}

data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"Green"},"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":"x"}

data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" tea"},"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":""}

data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}

⏹data: {"id":"c","object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":3,"total_tokens":5}}

data: [DONE]

`, text: "Green tea", finish: "stop", usage: `{"prompt_tokens":3,"total_tokens":5}`},
	"OpenAI: calls of two tools": {
		stream: `data: {"choices":[{"index":0,"delta":{"role":"assistant","content":null,"tool_calls":[{"index":0,"id":"call_1","type":"function","function":{"name":"brew","arguments":""}}]},"finish_reason":null}]}

data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\"tea\":"}}]},"finish_reason":null}]}

data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"\"\ud83c"}},{"index":1,"id":"call_2","type":"function","function":{"name":"pour","arguments":"{}"}}]},"finish_reason":null}]}

data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"\udf75\"}"}}]},"finish_reason":null}]}

data: {"choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}

⏹data: [DONE]

`, calls: `0 brew {"tea":"🍵"}; 1 pour {}`, finish: "tool_calls"},
	"OpenAI: an error in the stream": {
		stream: `data: {"choices":[{"index":0,"delta":{"content":"Gr"},"finish_reason":null}]}

data: {"error":{"message":"The server had an error","type":"server_error","param":null,"code":null}}

data: [DONE]

`, text: "Gr", fails: errSaid},
	"Azure: filters without a delta, before and after": {
		stream: `data: {"choices":[],"created":0,"id":"","model":"","object":"","prompt_filter_results":[{"prompt_index":0,"content_filter_results":{"hate":{"filtered":false,"severity":"safe"}}}]}

data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"finish_reason":null,"content_filter_results":{},"delta":{"role":"assistant","content":""}}]}

data: {"id":"c","choices":[{"index":0,"finish_reason":null,"content_filter_results":{"hate":{"filtered":false,"severity":"safe"}},"delta":{"content":"Green tea"}}]}

data: {"id":"","object":"","created":0,"choices":[{"index":0,"finish_reason":null,"content_filter_results":{},"content_filter_offsets":{"check_offset":44,"start_offset":44,"end_offset":198}}],"usage":null}

data: {"id":"c","choices":[{"index":0,"finish_reason":"content_filter","content_filter_results":{"hate":{"filtered":true,"severity":"high"}},"delta":{}}]}

⏹data: {"id":"","choices":[{"index":0,"finish_reason":null,"content_filter_offsets":{"check_offset":1,"start_offset":1,"end_offset":9}}]}

data: [DONE]

`, text: "Green tea", finish: "content_filter"},
	"vLLM: thinking under two names, usage in each event": {
		stream: `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":{"total_tokens":1}}

data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"reasoning":"Hm, ","reasoning_content":"Hm, "},"finish_reason":null}],"usage":{"total_tokens":2}}

data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"reasoning":"tea.","reasoning_content":"tea."},"finish_reason":null}],"usage":{"total_tokens":3}}

data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":"Green"},"finish_reason":null,"token_ids":null}],"usage":{"total_tokens":4}}

data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":" tea"},"finish_reason":"length","stop_reason":null}],"usage":{"total_tokens":5}}

⏹data: {"id":"chatcmpl-1","choices":[],"usage":{"total_tokens":5}}

data: [DONE]

`, thought: "Hm, tea.", text: "Green tea", finish: "length", usage: `{"total_tokens":5}`},
	"vLLM: an error, and [DONE]": {
		stream: `data: {"object":"error","message":"out of memory","type":"InternalServerError","param":null,"code":500}

data: [DONE]

`, fails: errSaid},
	"Ollama: an empty finish, thinking": {
		stream: `data: {"id":"chatcmpl-693","object":"chat.completion.chunk","system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":{"role":"assistant","content":"","reasoning":"Tea?"},"finish_reason":""}]}

data: {"id":"chatcmpl-693","choices":[{"index":0,"delta":{"role":"assistant","content":"Green tea"},"finish_reason":""}]}

data: {"id":"chatcmpl-693","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":"stop"}]}

⏹data: {"id":"chatcmpl-693","choices":[],"usage":{"total_tokens":9}}

data: [DONE]

`, thought: "Tea?", text: "Green tea", finish: "stop", usage: `{"total_tokens":9}`},
	"llama.cpp: null content, timings": {
		stream: `data: {"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}],"created":1,"id":"chatcmpl-a","object":"chat.completion.chunk"}

data: {"choices":[{"finish_reason":null,"index":0,"delta":{"reasoning_content":"Tea?"}}],"id":"chatcmpl-a"}

data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":"Green tea"}}],"id":"chatcmpl-a"}

data: {"choices":[{"finish_reason":"stop","index":0,"delta":{}}],"id":"chatcmpl-a"}

⏹data: {"choices":[],"id":"chatcmpl-a","usage":{"total_tokens":9},"timings":{"prompt_n":1,"predicted_per_second":42.1}}

data: [DONE]

`, thought: "Tea?", text: "Green tea", finish: "stop", usage: `{"total_tokens":9}`},
	"llama.cpp: the context is full": {
		stream: `data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":"Gr"}}]}

data: {"error":{"code":500,"message":"Context size has been exceeded.","type":"server_error"}}

`, text: "Gr", fails: errSaid},
	"LiteLLM: thinking in blocks as well": {
		stream: `data: {"id":"chatcmpl-2","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"reasoning_content":"Tea?","thinking_blocks":[{"type":"thinking","thinking":"Tea?","signature":null}],"provider_specific_fields":{"thinking_blocks":[{"type":"thinking","thinking":"Tea?"}]},"content":"","role":"assistant"}}]}

data: {"id":"chatcmpl-2","choices":[{"index":0,"delta":{"content":"Green tea"}}]}

data: {"id":"chatcmpl-2","choices":[{"finish_reason":"stop","index":0,"delta":{}}]}

⏹data: {"id":"chatcmpl-2","choices":[{"index":0,"delta":{}}],"usage":{"total_tokens":9}}

data: [DONE]

`, thought: "Tea?", text: "Green tea", finish: "stop", usage: `{"total_tokens":9}`},
	"OpenRouter: comments, thinking twice, a native finish": {
		stream: `: OPENROUTER PROCESSING

: OPENROUTER PROCESSING

data: {"id":"gen-1","provider":"P","choices":[{"index":0,"delta":{"role":"assistant","content":"","reasoning":"Tea","reasoning_details":[{"type":"reasoning.text","text":"Tea","format":"f","index":0}]},"finish_reason":null,"native_finish_reason":null,"logprobs":null}]}

data: {"id":"gen-1","choices":[{"index":0,"delta":{"role":"assistant","content":"","reasoning":null,"reasoning_details":[{"type":"reasoning.encrypted","data":"c2VjcmV0"}]},"finish_reason":null}]}

: OPENROUTER PROCESSING

data: {"id":"gen-1","choices":[{"index":0,"delta":{"role":"assistant","content":"Green tea"},"finish_reason":null,"native_finish_reason":null}]}

data: {"id":"gen-1","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":"stop","native_finish_reason":"completed"}]}

⏹data: {"id":"gen-1","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null,"native_finish_reason":null}],"usage":{"total_tokens":9,"cost":0.1}}

data: [DONE]

`, thought: "Tea", text: "Green tea", finish: "stop", usage: `{"total_tokens":9,"cost":0.1}`},
	"OpenRouter: thinking in details alone": {
		stream: `data: {"choices":[{"index":0,"delta":{"content":"","reasoning_details":[{"type":"reasoning.summary","summary":"Te"},{"type":"reasoning.text","text":"a"}]}}]}

data: {"choices":[{"index":0,"delta":{"content":"Green tea"}}]}

data: [DONE]⏹

`, thought: "Tea", text: "Green tea"},
	"OpenRouter: an error of a choice": {
		stream: `data: {"choices":[{"index":0,"delta":{"content":"Gr"},"finish_reason":null}]}

data: {"id":"gen-1","choices":[{"index":0,"delta":{"content":""},"finish_reason":"error","error":{"code":502,"message":"Provider disconnected"}}]}

data: [DONE]

`, text: "Gr", fails: errSaid},
	"OpenRouter: an error of a choice that has no finish": {
		stream: `data: {"choices":[{"index":0,"delta":{"content":"Gr"}}]}

data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":null,"error":{"code":502}}]}

data: [DONE]

`, text: "Gr", fails: errSaid},
	"a gateway: an error of a delta": {
		stream: `data: {"choices":[{"index":0,"delta":{"content":"Gr"}}]}

data: {"choices":[{"index":0,"delta":{"error":"Provider disconnected"}}]}

data: [DONE]

`, text: "Gr", fails: errSaid},
	"OpenRouter: all of the thinking once more": {
		stream: `data: {"choices":[{"index":0,"delta":{"reasoning":"Te"}}]}

data: {"choices":[{"index":0,"delta":{"reasoning":"a"}}]}

data: {"choices":[{"index":0,"delta":{"reasoning_details":[{"type":"reasoning.text","text":"Tea","signature":"x"}],"content":"Green tea"}}]}

data: [DONE]⏹

`, thought: "Tea", text: "Green tea"},
	"DeepSeek: keep-alives, usage with the finish": {
		stream: `: keep-alive

data: {"id":"d","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":null,"reasoning_content":""},"logprobs":null,"finish_reason":null}],"usage":null}

data: {"id":"d","choices":[{"index":0,"delta":{"content":null,"reasoning_content":"Tea?"},"finish_reason":null}],"usage":null}

: keep-alive

data: {"id":"d","choices":[{"index":0,"delta":{"content":"Green tea","reasoning_content":null},"finish_reason":null}],"usage":null}

data: {"id":"d","choices":[{"index":0,"delta":{"content":"","reasoning_content":null},"finish_reason":"stop"}],"usage":{"total_tokens":9}}

⏹data: [DONE]

`, thought: "Tea?", text: "Green tea", finish: "stop", usage: `{"total_tokens":9}`},
	"DeepSeek: it ran out of resources": {
		stream: `data: {"choices":[{"index":0,"delta":{"content":"Gr"},"finish_reason":null}]}

data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"insufficient_system_resource"}]}

data: [DONE]

`, text: "Gr", fails: errSaid},
	"Mistral: thinking as parts of the content": {
		stream: `data: {"id":"m","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}

data: {"id":"m","choices":[{"index":0,"delta":{"content":[{"type":"thinking","thinking":[{"type":"text","text":"Te"}]}]},"finish_reason":null}]}

data: {"id":"m","choices":[{"index":0,"delta":{"content":[{"type":"thinking","thinking":[{"type":"text","text":"a?"}],"closed":true},{"type":"text","text":"Green"}]},"finish_reason":null}]}

data: {"id":"m","choices":[{"index":0,"delta":{"content":[{"type":"reference","reference_ids":[1]}]},"finish_reason":null}]}

data: {"id":"m","choices":[{"index":0,"delta":{"content":" tea"},"finish_reason":"stop"}],"usage":{"total_tokens":9}}

⏹data: [DONE]

`, thought: "Tea?", text: "Green tea", finish: "stop", usage: `{"total_tokens":9}`},
	"Groq: its own usage": {
		stream: `data: {"id":"g","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"x_groq":{"id":"req_1"}}

data: {"id":"g","choices":[{"index":0,"delta":{"reasoning":"Tea?","channel":"analysis"},"logprobs":null,"finish_reason":null}]}

data: {"id":"g","choices":[{"index":0,"delta":{"content":"Green tea"},"logprobs":null,"finish_reason":null}]}

data: {"id":"g","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"x_groq":{"id":"req_1","usage":{"total_tokens":9}}}

⏹data: [DONE]

`, thought: "Tea?", text: "Green tea", finish: "stop", usage: `{"total_tokens":9}`},
	"Groq: stopped early": {
		stream: `data: {"choices":[{"index":0,"delta":{"content":"Gr"},"finish_reason":null}]}

event: error
data: over capacity

`, text: "Gr", fails: errSaid},
	"Together: text as well, and its own finish": {
		stream: `data: {"id":"t","object":"chat.completion.chunk","choices":[{"index":0,"text":"Green","logprobs":null,"finish_reason":null,"seed":null,"delta":{"token_id":2287,"role":"assistant","content":"Green","tool_calls":null}}],"usage":null}

data: {"id":"t","choices":[{"index":0,"text":" tea","finish_reason":"eos","seed":42,"delta":{"token_id":2,"role":"assistant","content":" tea","tool_calls":null}}],"usage":{"total_tokens":9}}

⏹data: [DONE]

`, text: "Green tea", finish: "eos", usage: `{"total_tokens":9}`},
	"Gemini: thoughts as content": {
		stream: `data: {"choices":[{"delta":{"content":"Tea?","extra_content":{"google":{"thought":true}},"role":"assistant"},"index":0}],"created":1,"id":"i","model":"gemini","object":"chat.completion.chunk"}

data: {"choices":[{"delta":{"content":"Green","role":"assistant"},"index":0}],"usage":{"total_tokens":5}}

data: {"choices":[{"delta":{"content":" tea","role":"assistant"},"finish_reason":"stop","index":0}],"usage":{"total_tokens":9}}

⏹data: [DONE]

`, thought: "Tea?", text: "Green tea", finish: "stop", usage: `{"total_tokens":9}`},
	"Gemini: calls of tools without indexes": {
		stream: `data: {"choices":[{"delta":{"role":"assistant","tool_calls":[{"extra_content":{"google":{"thought_signature":"EjQ"}},"function":{"arguments":"{\"tea\":","name":"brew"},"id":"f1","type":"function"}]},"index":0}]}

data: {"choices":[{"delta":{"role":"assistant","tool_calls":[{"function":{"arguments":"1}"}}]},"index":0}]}

data: {"choices":[{"delta":{"role":"assistant","tool_calls":[{"function":{"arguments":"{}","name":"pour"},"id":"f2","type":"function"}]},"finish_reason":"stop","index":0}]}

⏹data: [DONE]

`, calls: `0 brew {"tea":1}; 1 pour {}`, finish: "stop"},
	"Anthropic: its compatible endpoint": {
		stream: `data: {"id":"msg_1","choices":[{"index":0,"delta":{"content":"","role":"assistant"}}],"created":1,"model":"claude","object":"chat.completion.chunk"}

data: {"id":"msg_1","choices":[{"index":0,"delta":{"content":"Green tea"}}]}

data: {"id":"msg_1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}

⏹data: {"id":"msg_1","choices":[],"usage":{"total_tokens":9}}

data: [DONE]

`, text: "Green tea", finish: "stop", usage: `{"total_tokens":9}`},
	"Anthropic: an error as its own API has it": {
		stream: `data: {"choices":[{"index":0,"delta":{"content":"Gr"}}]}

event: error
data: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}

`, text: "Gr", fails: errSaid},
	"KoboldCpp: the finish is the text null": {
		stream: `data: {"id":"koboldcpp","object":"chat.completion.chunk","choices":[{"index":0,"finish_reason":"null","delta":{"role":"assistant","content":"Green"}}]}

data: {"id":"koboldcpp","choices":[{"index":0,"finish_reason":"null","delta":{"role":"assistant","content":" tea"}}]}

data: {"id":"koboldcpp","choices":[{"index":0,"finish_reason":"stop","delta":{"role":"assistant","content":""}}]}

⏹data: [DONE]

`, text: "Green tea", finish: "stop"},
	"a gateway: no finish but [DONE]": {
		stream: `data: {"choices":[{"index":0,"delta":{"content":"Green tea"},"finish_reason":null}]}

data: [DONE]⏹

`, text: "Green tea"},
	"a gateway: stop in each event": {
		stream: `data: {"choices":[{"index":0,"delta":{"reasoning_content":"Tea?"},"finish_reason":"stop"}]}

data: {"choices":[{"index":0,"delta":{"content":"Green"},"finish_reason":"stop"}]}

data: {"choices":[{"index":0,"delta":{"content":" tea"},"finish_reason":"stop"}]}

data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}

data: [DONE]⏹

`, thought: "Tea?", text: "Green tea", finish: "stop", claims: true},
	"a gateway: text after a finish": {
		stream: `data: {"choices":[{"index":0,"delta":{"role":"assistant"},"finish_reason":"stop"}]}

data: {"choices":[{"index":0,"delta":{"content":"Green"},"finish_reason":null}]}

data: {"choices":[{"index":0,"delta":{"content":" tea"},"finish_reason":null}]}

data: [DONE]⏹

`, text: "Green tea", claims: true},
	"a gateway: no space, and several values in an event": {
		stream: `data:{"choices":[{"index":0,"delta":{"content":"Green"}}]}
data:{"choices":[{"index":0,"delta":{"content":" tea"}}]}
data:[DONE]⏹

`, text: "Green tea"},
	"everything that a stream may have, with CR": {
		stream: "\uFEFF" + strings.ReplaceAll(`event: message
id: 1
data: {"error":null,"choices":[{"index":0,"error":null,"delta":
data: {"content":"Green","error":{}}}]}

data:

data: : keepalive

: a comment
retry: 7

data: 7

data: {"choices":[{"index":0,"delta":{"content":" \ud83c"}}]}

data: {"choices":[{"index":0,"delta":{"content":"\udf75 \\ud83c"}}]}

data: {"choices":[{"index":0,"delta":{"content":"."}}]}

data: {"choices":[{"index":1,"delta":{"content":"another"},"finish_reason":"stop"}]}

data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}

⏹data: {"choices":null,"usage":[]}

data: [DONE]

`, "\n", "\r"), text: `Green 🍵 \ud83c.`, finish: "stop"},
	"a gateway: the thinking changes its member": {
		stream: `data: {"choices":[{"index":0,"delta":{"reasoning_content":"\n","reasoning":""}}]}

data: {"choices":[{"index":0,"delta":{"reasoning":"Te","reasoning_content":"Te"}}]}

data: {"choices":[{"index":0,"delta":{"reasoning_content":"a"}}]}

data: {"choices":[{"index":0,"delta":{"reasoning":{"content":", hm"}}}]}

data: {"choices":[{"index":0,"delta":{"thinking":", hm"}}]}

data: {"choices":[{"index":0,"delta":{"thinking":"?","reasoning_text":"!"}}]}

data: {"choices":[{"index":0,"delta":{"content":"Green tea"}}]}

data: [DONE]⏹

`, thought: "\nTea, hm, hm!?", text: "Green tea"},
	"a gateway: indexes of calls as text": {
		stream: `data: {"choices":[{"delta":{"tool_calls":[{"index":"0","id":"a","function":{"name":"brew","arguments":null}},{"index":"1","id":"b","function":{"name":"pour","arguments":""}}]}}]}

data: {"choices":[{"delta":{"tool_calls":[{"index":"1","function":{"arguments":"{\"for\":"}}]}}]}

data: {"choices":[{"delta":{"tool_calls":[{"index":0.0,"id":null,"function":{"name":null,"arguments":"{}"}}]}}]}

data: {"choices":[{"delta":{"tool_calls":[{"index":1,"id":"","function":{"name":"","arguments":"2}"}}]}}]}

data: {"choices":[{"delta":{},"finish_reason":"tool_calls"}]}

⏹data: [DONE]

`, calls: `0 brew {}; 1 pour {"for":2}`, finish: "tool_calls"},
	"a gateway: calls with ids alone": {
		stream: `data: {"choices":[{"delta":{"tool_calls":[{"index":[],"id":"a","function":{"name":"brew","arguments":""}},{"id":"b","function":{"name":"pour","arguments":""}}]}}]}

data: {"choices":[{"delta":{"tool_calls":[{"index":-1,"id":"b","function":{"arguments":"{\"for\":"}},{"id":"a","function":{"arguments":"{"}}]}}]}

data: {"choices":[{"delta":{"tool_calls":[{"function":{"arguments":"}"}},{"function":{"arguments":"2"}}]}}]}

data: {"choices":[{"delta":{"tool_calls":[{"id":"b","function":{"name":"pour"}}]}}]}

data: {"choices":[{"delta":{"tool_calls":[{"function":{"arguments":"}"}}]}}]}

data: {"choices":[{"delta":{"tool_calls":[{"id":"b","function":{"name":"drink","arguments":"{}"}}]}}]}

data: [DONE]⏹

`, calls: `0 brew {}; 1 pour {"for":2}; 2 drink {}`},
	"a gateway: one index for all calls": {
		stream: `data: {"choices":[{"delta":{"tool_calls":[{"index":0,"id":"a","function":{"name":"brew","arguments":"{}"}},{"index":0,"id":"b","function":{"name":"pour","arguments":"{"}}]}}]}

data: {"choices":[{"delta":{"tool_calls":[{"index":0,"id":"c","function":{"arguments":"}"}}]}}]}

data: {"choices":[{"delta":{"tool_calls":[{"id":"d","function":{"name":"drink","arguments":{"a":1,"a":2}}}]}}]}

data: [DONE]⏹

`, calls: `0 brew {}; 1 pour {}; 2 drink {"a":1,"a":2}`},
	"members of any shape": {
		stream: `data: {"id":7,"choices":[{"index":"0","delta":{"content":{"type":"text","text":"Green"},"refusal":false,"tool_calls":"none","role":[]},"finish_reason":{"type":"stop"},"logprobs":true}],"usage":"none","x_groq":[],"object":{}}

data: {"choices":[{"delta":{"content":[" ",{"text":"tea"},{"text":7},9,null,[]],"reasoning":{"effort":"low"},"reasoning_details":"","tool_calls":[]},"finish_reason":false}]}

data: {"choices":[7,{"delta":"none"},{"delta":{"content":9}}]}

data: {"choices":[{"delta":{"refusal":"","content":""},"finish_reason":"stop"}]}

⏹data: {"choices":"none"}

data: [DONE]

`, text: "Green tea", finish: "stop"},
}

// played is a service that plays a stream. It is the transport of an OpenAI, so no network is
// needed.
type played struct {
	stream string
	pieces bool  // it arrives in pieces that end anywhere
	then   error // how it ends; nil: it falls silent
}

func (p *played) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{
		StatusCode: 200, ProtoMajor: 1, ContentLength: -1, TransferEncoding: []string{"chunked"},
		Header: http.Header{"Content-Type": {"text/event-stream"}}, Body: &playing{p: *p, ctx: r.Context()},
	}, nil
}

type playing struct {
	p   played
	ctx context.Context
}

func (b *playing) Read(to []byte) (int, error) {
	if b.p.stream == "" {
		if b.p.then != nil {
			return 0, b.p.then
		}
		<-b.ctx.Done()
		return 0, b.ctx.Err()
	}
	n := len(b.p.stream)
	if b.p.pieces {
		n = min(n, 1+rand.IntN(40))
	}
	n = copy(to, b.p.stream[:n])
	b.p.stream = b.p.stream[n:]
	return n, nil
}

func (b *playing) Close() error { return nil }

// heard is the content of an answer.
type heard struct{ thought, text, calls, finish, usage string }

func (h *heard) take(p Piece) {
	switch {
	case p.Reasoning:
		h.thought += p.Text
	default:
		h.text += p.Text
	}
	var calls []struct {
		Index    int
		Function struct{ Name, Arguments string }
	}
	_ = json.Unmarshal(p.ToolCalls, &calls)
	for _, c := range calls {
		if c.Function.Name != "" && !strings.Contains(h.calls, fmt.Sprintf("; %d %s ", c.Index, c.Function.Name)) {
			h.calls += fmt.Sprintf("; %d %s ", c.Index, c.Function.Name)
		}
		at := strings.Index(h.calls, fmt.Sprintf("; %d ", c.Index))
		end := strings.Index(h.calls[at+1:], "; ")
		if end < 0 {
			end = len(h.calls)
		} else {
			end += at + 1
		}
		h.calls = h.calls[:end] + c.Function.Arguments + h.calls[end:]
	}
	h.finish += p.Finish
	h.usage += string(p.Usage)
}

// play asks once.
func play(ctx context.Context, p played) (h heard, err error) {
	o := &OpenAI{cfg: DefaultConfig(), url: "http://service/v1", http: &http.Client{Transport: &p}}
	err, _ = o.attempt(ctx, nil, func(p Piece) bool { h.take(p); return true })
	h.calls = strings.TrimPrefix(h.calls, "; ")
	return h, err
}

// said returns the content of a stream's whole events, as another parser reads it.
func said(stream string) (h heard) {
	var a answer
	for e := range tmaxmax.Read(strings.NewReader(stream), nil) {
		all, err := a.take(sse.Event{Name: e.Type, Data: e.Data})
		for _, p := range all {
			h.take(p)
		}
		if a.stage == done || err != nil {
			break
		}
	}
	h.calls = strings.TrimPrefix(h.calls, "; ")
	return h
}

var errCut = errors.New("cut")

func TestServices_eachStreamSaysWhatItSays(t *testing.T) {
	t.Parallel()
	for name, s := range services {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			stream := strings.Replace(s.stream, "⏹", "", 1)
			for _, pieces := range []bool{false, true} {
				got, err := play(t.Context(), played{stream: stream, pieces: pieces, then: io.EOF})
				if want := (heard{s.thought, s.text, s.calls, s.finish, s.usage}); got != want || !errors.Is(err, s.fails) || s.fails == nil && err != nil {
					t.Errorf("%+v, %v\nand not\n%+v, %v", got, err, want, s.fails)
				}
			}
		})
	}
}

// Promise: an answer that did not end is never done. A stream is cut at each byte, or falls silent
// there, or ends there. An event that has begun there counts only if it is whole by itself.
func TestServices_anAnswerIsCompleteWhereItsServiceSaidSoAndNowhereElse(t *testing.T) {
	t.Parallel()
	for name, s := range services {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				before, after, ends := strings.Cut(s.stream, "⏹")
				stream := before + after
				end := len(strings.TrimRight(before, "\r\n")) // of the event that completes the answer
				var want heard
				for at := range len(stream) {
					change := at == 0 || strings.ContainsAny(stream[at-1:at], "\r\n]}")
					if change {
						want = said(stream[:at] + "\n\n")
					}
					// [DONE] completes the answer, whatever comes after it.
					complete := ends && at >= end && (strings.HasSuffix(before[:end], "[DONE]") || !unfinished(stream[:at]))
					for how, then := range map[string]error{"broken": errCut, "silent": nil, "ended": io.EOF} {
						if how == "silent" && !change {
							continue // the same as at the byte before
						}
						got, err := play(t.Context(), played{stream: stream[:at], then: then})
						got.finish, got.usage, want.finish, want.usage = "", "", "", ""
						switch {
						case got != want:
							t.Fatalf("%s at byte %d, %q: %+v, and not %+v", how, at, tail(stream[:at]), got, want)
						case how == "ended" && s.claims && !unfinished(stream[:at]): // the end confirms the claim: see the next test
						case complete != (err == nil):
							t.Fatalf("%s at byte %d, %q: %v", how, at, tail(stream[:at]), err)
						case how == "silent" && !complete && !errors.Is(err, errSilent) && !errors.Is(err, s.fails):
							t.Fatalf("silent at byte %d: %v", at, err)
						}
					}
				}
			})
		})
	}
}

// unfinished reports whether a stream ends inside an event that is not whole by itself.
func unfinished(stream string) bool {
	stream = strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(strings.TrimPrefix(stream, "\uFEFF"))
	last := stream[strings.LastIndex("\n\n"+stream, "\n\n"):]
	begun, data := false, ""
	for i, line := range strings.Split(last, "\n") {
		name, value, _ := strings.Cut(line, ":")
		whole := i < strings.Count(last, "\n")
		begun = begun || name == "event" || name == "data" || !whole && name != ""
		if name == "data" {
			data += value + "\n"
		}
	}
	return begun && (strings.TrimSpace(data) == "" || !whole(data))
}

// whole reports whether the data of an event is readable: [DONE], JSON values, and comments.
func whole(data string) bool {
	_, err := new(answer).take(sse.Event{Data: data})
	return !errors.Is(err, errJSON)
}

func tail(text string) string { return text[max(len(text)-60, 0):] }

// A finish that may be a habit does not end the answer before the response ends.
func TestAnswer_finishInEachEventIsConfirmedByTheEndAlone(t *testing.T) {
	t.Parallel()
	word := `data: {"choices":[{"delta":{"content":"Green"},"finish_reason":"stop"}]}` + "\n\n"
	bare := `data: {"choices":[{"delta":{"content":"Green"}}]}` + "\n\n"
	stop := `data: {"choices":[{"delta":{},"finish_reason":"stop"}]}` + "\n\n"
	null := `data: {"choices":[{"delta":{"content":"Green"},"finish_reason":"null"}]}` + "\n\n"
	thought := `data: {"choices":[{"delta":{"reasoning":"Hm"},"finish_reason":"stop"}]}` + "\n\n"
	failed := `data: {"error":{"message":"TimeoutError","code":504}}` + "\n\n"
	torn := `data: {"choices":[{"index":0,"delta":{"content":" world and mo`
	end := "data: [DONE]\n\n"
	for stream, want := range map[string][3]error{ // cut, silent, ended
		word:                        {errCut, errSilent, nil},
		word + word:                 {errCut, errSilent, nil},
		word + stop:                 {nil, nil, nil},
		bare + word:                 {nil, nil, nil},
		bare + word + bare:          {errCut, errSilent, errShort},
		bare + word + bare + word:   {errCut, errSilent, nil},
		bare + stop + bare + stop:   {errCut, errSilent, nil},
		bare + thought:              {errCut, errSilent, errShort},
		thought + bare + stop:       {nil, nil, nil},
		thought + stop:              {errEmpty, errEmpty, errEmpty},
		stop:                        {errCut, errSilent, errEmpty},
		stop + bare:                 {errCut, errSilent, errShort},
		null:                        {errCut, errSilent, errShort},
		null + null + stop:          {nil, nil, nil},
		bare + "data: [DONE]\n\n":   {nil, nil, nil},
		"data: [DONE]\n\n" + bare:   {errEmpty, errEmpty, errEmpty},
		bare + "data: oh no\n\n":    {errJSON, errJSON, errJSON},
		bare + stop + "data: {\n\n": {errJSON, errJSON, errJSON},
		bare + stop + failed:        {errSaid, errSaid, errSaid},
		// The stream ends inside an event.
		bare + stop + torn: {errCut, errSilent, errShort},
		word + word + torn: {errCut, errSilent, errShort},
		bare + stop + `data: {"error":{"message":"overlo`:    {errCut, errSilent, errShort},
		bare + stop + "data: [DON":                           {errCut, errSilent, errShort},
		bare + stop + "data:":                                {errCut, errSilent, errShort},
		bare + stop + "da":                                   {errCut, errSilent, errShort},
		bare + stop + "event: messa":                         {errCut, errSilent, errShort},
		bare + stop + "event: error\n":                       {errSaid, errSaid, errSaid},
		bare + stop + "data: {\n":                            {errCut, errSilent, errShort},
		bare + stop + "data: {\"error\":\ndata: {\"code\":7": {errCut, errSilent, errShort},
		bare + stop + torn + "\n\n":                          {errJSON, errJSON, errJSON},
		stop + torn:                                          {errCut, errSilent, errShort},
		bare + strings.TrimRight(stop, "\n"):                 {nil, nil, nil},
		bare + "data: [DONE]":                                {nil, nil, nil},
		bare + stop + strings.TrimRight(failed, "\n"):        {errSaid, errSaid, errSaid},
		bare + stop + strings.TrimRight(bare, "\n"):          {errCut, errSilent, errShort},
		bare + stop + ": a comm":                             {nil, nil, nil},
		bare + stop + "data: : a comm":                       {nil, nil, nil},
		bare + stop + " ":                                    {nil, nil, nil},
		// An error that has lost its form.
		bare + "event: error\n\n" + end:                                                             {errSaid, errSaid, errSaid},
		bare + "event: Error\ndata: {}\n\n" + end:                                                   {errSaid, errSaid, errSaid},
		bare + `data: {"message":"Internal error","code":500}` + "\n\n" + end:                       {errSaid, errSaid, errSaid},
		bare + `data: {"detail":[{"loc":["body"],"msg":"Input too long"}]}` + "\n\n" + end:          {errSaid, errSaid, errSaid},
		bare + `data: {"detail":{"error":"x"}}` + "\n\n" + end:                                      {errSaid, errSaid, errSaid},
		bare + `data: {"message":{"text":"x"}}` + "\n\n" + end:                                      {errSaid, errSaid, errSaid},
		bare + `data: {"code":503.0}` + "\n\n" + end:                                                {errSaid, errSaid, errSaid},
		bare + `data: {"code":{"n":1}}` + "\n\n" + end:                                              {errSaid, errSaid, errSaid},
		bare + `data: {"status":503}` + "\n\n" + end:                                                {errSaid, errSaid, errSaid},
		bare + `data: {"fault":{"faultstring":"x"}}` + "\n\n" + end:                                 {errSaid, errSaid, errSaid},
		bare + `data: {"success":false,"msg":"x"}` + "\n\n" + end:                                   {errSaid, errSaid, errSaid},
		bare + `data: {"error_code":5,"error_msg":"x"}` + "\n\n" + end:                              {errSaid, errSaid, errSaid},
		bare + `data: {"Error":{"m":1}}` + "\n\n" + end:                                             {errSaid, errSaid, errSaid},
		bare + `data: {"code":200,"status":500}` + "\n\n" + end:                                     {errSaid, errSaid, errSaid},
		bare + `data: {"choices":[{"delta":{},"finish_reason":"network_error"}]}` + "\n\n" + end:    {errSaid, errSaid, errSaid},
		bare + `data: {"code":0,"message":"ok"}` + "\n\n" + end:                                     {nil, nil, nil},
		bare + `data: {"code":"0","message":"ok"}` + "\n\n" + end:                                   {nil, nil, nil},
		bare + `data: {"status":"in_progress"}` + "\n\n" + end:                                      {nil, nil, nil},
		bare + `data: {"status":200,"message":"OK"}` + "\n\n" + end:                                 {nil, nil, nil},
		bare + `data: {"success":true}` + "\n\n" + end:                                              {nil, nil, nil},
		bare + `data: {"code":"rate_limit"}` + "\n\n" + end:                                         {errSaid, errSaid, errSaid},
		bare + `data: {"code":"500","choices":[]}` + "\n\n" + end:                                   {errSaid, errSaid, errSaid},
		bare + `data: {"detail":"Internal Server Error"}` + "\n\n" + end:                            {errSaid, errSaid, errSaid},
		bare + `data: {"success":false,"errors":[{"code":7}]}` + "\n\n" + end:                       {errSaid, errSaid, errSaid},
		bare + `data: {"message":"ok","code":0}` + "\n\n" + end:                                     {nil, nil, nil},
		bare + `data: {"message":"ok","code":"200"}` + "\n\n" + end:                                 {nil, nil, nil},
		bare + `data: {"type":"ping","message":{}}` + "\n\n" + end:                                  {nil, nil, nil},
		bare + `data: {"error":{ },"choices":[{"error":[ ],"delta":{"error":" "}}]}` + "\n\n" + end: {nil, nil, nil},
		bare + `data: {"error":0.0}` + "\n\n" + end:                                                 {nil, nil, nil},
		bare + `data: {"error":{ "a":1}}` + "\n\n" + end:                                            {errSaid, errSaid, errSaid},
		bare + `data: {"error":true}` + "\n\n" + end:                                                {errSaid, errSaid, errSaid},
	} {
		for i, then := range []error{errCut, nil, io.EOF} {
			synctest.Test(t, func(t *testing.T) {
				if _, err := play(t.Context(), played{stream: stream, then: then}); !errors.Is(err, want[i]) || want[i] == nil && err != nil {
					t.Errorf("%s and %v: %v, and not %v", stream, then, err, want[i])
				}
			})
		}
	}
}

// slowly is a body that sends something again and again.
type slowly struct {
	every time.Duration
	text  string
	times int
	ctx   context.Context
}

func (s *slowly) Read(to []byte) (int, error) {
	if s.times == 0 {
		return 0, io.EOF
	}
	s.times--
	select {
	case <-time.After(s.every):
		return copy(to, s.text), nil
	case <-s.ctx.Done():
		return 0, s.ctx.Err()
	}
}

func (s *slowly) Close() error { return nil }

// bodies is a transport that responds with bodies, one after the other, as one response.
type bodies func(ctx context.Context) []io.Reader

func (b bodies) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{
		StatusCode: 200, ProtoMajor: 2, ContentLength: -1, Header: http.Header{"Content-Type": {"text/event-stream"}},
		Body: io.NopCloser(io.MultiReader(b(r.Context())...)),
	}, nil
}

// A comment is a sign of life, but only for a limited time.
func TestAnswer_commentsAreSignsOfLifeWithinBounds(t *testing.T) {
	t.Parallel()
	word, stop := `data: {"choices":[{"delta":{"content":"Green"}}]}`+"\n\n", `data: {"choices":[{"delta":{},"finish_reason":"stop"}]}`+"\n\n"
	thought := `data: {"choices":[{"delta":{"reasoning":"Hm"}}]}` + "\n\n"
	minutes := func(n int) int { return n * 3 }
	for name, c := range map[string]struct {
		before string
		life   slowly
		after  string
		want   error
		within time.Duration
	}{
		"before the first word":  {"", slowly{every: 20 * time.Second, text: ": busy\n\n", times: minutes(30)}, word + stop, nil, 31 * time.Minute},
		"between two words":      {word, slowly{every: 20 * time.Second, text: ": busy\n\n", times: minutes(30)}, word + stop, nil, 31 * time.Minute},
		"data without a meaning": {word, slowly{every: 20 * time.Second, text: "data: : busy\n\n", times: minutes(30)}, word + stop, nil, 31 * time.Minute},
		"thinking":               {"", slowly{every: 100 * time.Second, text: thought, times: 60}, word + stop, nil, 101 * time.Minute},
		"too seldom":             {word, slowly{every: 31 * time.Second, text: ": busy\n\n", times: 9}, word + stop, errSilent, 31 * time.Second},
		"too long":               {word, slowly{every: 20 * time.Second, text: ": busy\n\n", times: minutes(90)}, word + stop, errSilent, 61 * time.Minute},
		"too much":               {word, slowly{every: time.Microsecond, text: ":" + strings.Repeat("x", 8000) + "\n", times: 9000}, word + stop, errLarge, time.Minute},
		"after a finish":         {word + stop, slowly{every: time.Second, text: ": busy\n\n", times: 100}, "", nil, 6 * time.Second},
		"one event":              {word, slowly{every: time.Microsecond, text: "data: " + strings.Repeat("x", 8000) + "\n", times: 200}, stop, errLarge, time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				o := &OpenAI{cfg: DefaultConfig(), url: "http://service/v1", http: &http.Client{Transport: bodies(func(ctx context.Context) []io.Reader {
					c.life.ctx = ctx
					return []io.Reader{strings.NewReader(c.before), &c.life, strings.NewReader(c.after)}
				})}}
				begun := time.Now()
				err, _ := o.attempt(t.Context(), nil, func(Piece) bool { return true })
				if took := time.Since(begun); !errors.Is(err, c.want) || c.want == nil && err != nil || took > c.within {
					t.Errorf("%v after %v", err, took)
				}
			})
		})
	}
}

// The index of a call may be a number or text, and its arguments text, a value, or nothing.
func TestCalls_readsEveryForm(t *testing.T) {
	t.Parallel()
	for data, want := range map[string]string{
		`[{"index":0,"id":"a","type":"function","function":{"name":"f","arguments":"{\"x\":1}"}}]`: `0 a f {"x":1}`,
		`[{"index":"1","function":{"arguments":null}},{"index":1.0,"function":{}}]`:                `1   ; 1   `,
		`[{"function":{"arguments":{"x":1,"x":2}}},{"index":[7],"function":{"arguments":[]}}]`:     `0   {"x":1,"x":2}; 1   []`,
		`[{"index":-1},{"index":1e99},7,{"index":null},{"index":"no"},{"index":" 2 "}]`:            `0   ; 1   ; 2   ; 3   ; 4   ; 2   `,
	} {
		var got []string
		for _, c := range Calls(json.RawMessage(data)) {
			got = append(got, fmt.Sprintf("%s %s %s %s", c.Index, c.ID, c.Name, c.Arguments))
		}
		if strings.Join(got, "; ") != want {
			t.Errorf("%s: %q, and not %q", data, got, want)
		}
	}
}

// A value that some JSON parsers refuse is not lost: the last one of duplicate names counts.
func TestAnswer_duplicateNamesLoseNothing(t *testing.T) {
	t.Parallel()
	got, err := play(t.Context(), played{then: io.EOF, stream: `data: {"choices":[{"delta":{"content":"a","content":"b","tool_calls":[{"index":0,"x":{"n":12345678901234567890,"n":1e999},"function":{"name":"e","name":"f","arguments":{"s":"\ud800"}}}]}}]}

data: {"choices":[],"usage":{"n":1,"n":12345678901234567890,"s":"\ud800"}}

data: [DONE]

`})
	if want := (heard{"", "b", `0 f {"s":"\ud800"}`, "", `{"n":12345678901234567890,"s":"` + "\uFFFD" + `"}`}); got != want || err != nil {
		t.Errorf("%+v, %v", got, err)
	}
	calls := new(texts).toolCalls([]json.RawMessage{json.RawMessage(`{"x":{"n":1,"n":1e999}}`)})
	if want := `[{"index":0,"x":{"n":1e999}}]`; string(calls) != want {
		t.Errorf("%s, and not %s", calls, want)
	}
}

// Characters that are split between two events become whole again, in every notation.
func TestTexts_joinCharacters(t *testing.T) {
	t.Parallel()
	for _, c := range [][]string{
		{`a\ud83c`, `\udf75b`, "a🍵b"}, {`a\uD83C`, `b`, "a\uFFFDb"}, {`\ud83c`, ``, `\udf75`, "🍵"}, {`a\\ud83c`, `b`, `a\ud83cb`},
		{`a\\\ud83c`, `\udf75`, `a\🍵`}, {`\udf75`, `b`, "\uFFFDb"}, {"a\xf0\x9f", "\x8d\xb5b", "a🍵b"}, {"a\xf0", "b", "a\uFFFDb"},
		{"\xff", "b", "\uFFFDb"}, {`\ud83c\ud83c`, `\udf75`, "\uFFFD🍵"}, {"ä", "ö", "äö"},
	} {
		var all texts
		var got strings.Builder
		for _, text := range c[:len(c)-1] {
			got.WriteString(all.join("content", json.RawMessage(`"`+text+`"`)))
		}
		if want := c[len(c)-1]; got.String() != want {
			t.Errorf("%q is %q, and not %q", c[:len(c)-1], got.String(), want)
		}
	}
}
