// Command go appends an answer to a session, each word exactly once, whatever happens to a node meanwhile.
//
//	go run ./examples/go http://127.0.0.1:8080 demo
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// Producer appends chunks to a session. Name identifies it there. A program that starts again takes a higher Epoch.
type Producer struct {
	Nodes   []string // base URLs; behind a balancer one is enough
	Session string
	Name    string
	Epoch   int
	Token   string // may be empty

	number int
}

// Append appends chunks, all or none, each of them exactly once. It retries until ctx ends, or until the server refuses them.
func (p *Producer) Append(ctx context.Context, chunks ...any) error {
	body, err := json.Marshal(chunks)
	if err != nil {
		return err
	}
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		status, err := p.post(ctx, body)
		switch {
		case status == http.StatusOK, status == http.StatusCreated:
			p.number += len(chunks)
			return nil
		case status != 0 && status < 500 && status != http.StatusTooManyRequests:
			return err
		}
		p.Nodes = append(p.Nodes[1:], p.Nodes[0]) // no final answer: it is safe to say the same again, elsewhere
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		}
	}
}

func (p *Producer) post(ctx context.Context, body []byte) (status int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, p.Nodes[0]+"/v1/sessions/"+url.PathEscape(p.Session)+"/chunks", bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Producer-Id", p.Name)
	r.Header.Set("Producer-Epoch", fmt.Sprint(p.Epoch))
	r.Header.Set("Producer-Chunk", fmt.Sprint(p.number))
	if p.Token != "" {
		r.Header.Set("Authorization", "Bearer "+p.Token)
	}
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	text, _ := io.ReadAll(response.Body)
	return response.StatusCode, fmt.Errorf("%s: %s", response.Status, text)
}

type chunk struct {
	Type      string `json:"type,omitempty"`
	MessageID string `json:"message_id,omitempty"`
	Content   string `json:"content,omitempty"`
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: go URL[,URL…] SESSION")
		os.Exit(2)
	}
	ctx := context.Background()
	p := &Producer{Nodes: strings.Split(os.Args[1], ","), Session: os.Args[2], Name: "example"}
	for i := range 60 { // stands for your model
		time.Sleep(30 * time.Millisecond)
		if err := p.Append(ctx, chunk{MessageID: "m1", Content: fmt.Sprintf("word%d ", i)}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	if err := p.Append(ctx, chunk{MessageID: "m1", Type: "done"}, chunk{Type: "end"}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
