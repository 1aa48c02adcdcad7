package test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// http2 is live with one message in flight, through Go's client over HTTP/2, with as many streams per connection as the
// server allows. The client's cost does not count. run checks its watchers.
func (g *generator) http2() (o outcome, err error) {
	protocols := &http.Protocols{}
	protocols.SetHTTP2(g.TLS)
	protocols.SetUnencryptedHTTP2(!g.TLS)
	scheme := "http"
	if g.TLS {
		scheme = "https"
	}
	client := &http.Client{Transport: &http.Transport{
		Protocols: protocols, DialContext: (&net.Dialer{}).DialContext, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, // the test's own certificate
	}}
	url := scheme + "://" + g.Addr + "/v1/sessions/" + g.name(0)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()

	var got atomic.Int64
	all := make(chan struct{}, 1) // every viewer has the newest message
	answered := make(chan error, g.Viewers)
	for i := range g.Viewers {
		w := &watcher{}
		g.watchers[-1-i] = w
		wg.Go(func() {
			r, err := http.NewRequestWithContext(ctx, "GET", url+"/stream", nil)
			if err != nil {
				answered <- err
				return
			}
			response, err := client.Do(r)
			if answered <- err; err != nil {
				return
			}
			defer response.Body.Close()
			for b := make([]byte, 4096); ; {
				n, err := response.Body.Read(b)
				w.text(b[:n], func(number int, _ time.Duration) {
					w.tally.take(number)
					if got.Add(1)%int64(g.Viewers) == 0 {
						all <- struct{}{}
					}
				})
				if err != nil {
					return
				}
			}
		})
	}
	for range g.Viewers {
		err = errors.Join(err, <-answered)
	}
	say := func() error {
		response, err := client.Post(url+"/chunks", "application/json", strings.NewReader(string(message(nil, g.said[0], 0))))
		if err != nil {
			return err
		}
		if response.StatusCode != http.StatusCreated {
			err = errors.New(response.Status)
		}
		g.said[0]++
		select {
		case <-all:
		case <-time.After(10 * time.Second):
			err = fmt.Errorf("message %d did not come to all", g.said[0])
		}
		return errors.Join(err, response.Body.Close())
	}
	during := func(d time.Duration) {
		for end := time.Now().Add(d); err == nil && time.Now().Before(end); {
			err = say()
		}
	}
	during(g.Warm)
	before, failed := g.usage()
	from := g.said[0]
	during(g.For)
	after, failed2 := g.usage()
	o.Seconds, o.CPU, o.Own = (after.at - before.at).Seconds(), after.servers-before.servers, after.own-before.own
	o.Foreign, o.Published = max(0, after.foreign-before.foreign), g.said[0]-from
	o.Delivered = o.Published * g.Viewers
	return o, errors.Join(err, failed, failed2)
}
