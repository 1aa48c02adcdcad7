package web_test

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"net/http"
	"testing"

	"github.com/chromedp/chromedp"

	"gapless/store/storetest"
)

// In HTTP/1.1, a browser makes six connections to a server, and a seventh stream hangs.
func TestTLS_aPageHasItsTwentyStreamsInOneConnection(t *testing.T) {
	t.Parallel()
	cert, key := storetest.NewAuthority(t).Issue("127.0.0.1")
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(pair.Leaf)
	n := startOver(t, &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}},
		"-tls-cert", cert, "-tls-key", key)
	hash := sha256.Sum256(pair.Leaf.RawSubjectPublicKeyInfo)
	browser := chromium(t, chromedp.Flag("ignore-certificate-errors-spki-list", base64.StdEncoding.EncodeToString(hash[:])))

	p := open(t, browser, n.url("/"))
	if got := eval[string](p, `performance.getEntriesByType('navigation')[0].nextHopProtocol`); got != "h2" {
		t.Errorf("the page came over %q", got)
	}
	p.ask("Why is there a tide?")
	p.until(`document.querySelectorAll('#log article').length === 2`)

	const count = 20
	for i := range count {
		n.post(t, fmt.Sprintf("/v1/sessions/tls%d/chunks", i), chunk{Content: "before"})
	}
	p.run(fmt.Sprintf(`window.got = {}, window.errors = 0;
		for (let i = 0; i < %d; i++) {
			const source = new EventSource('/v1/sessions/tls' + i + '/stream');
			source.onmessage = e => (got[i] ??= []).push(e.lastEventId);
			source.onerror = () => errors++;
		}`, count))
	p.until(fmt.Sprintf(`Object.keys(got).length === %d`, count))
	for i := range count {
		n.post(t, fmt.Sprintf("/v1/sessions/tls%d/chunks", i), chunk{Content: "live"})
	}
	p.until(fmt.Sprintf(`Object.values(got).filter(g => g.join() === '1,2').length === %d`, count))
	if got := eval[int](p, `errors`); got != 0 {
		t.Errorf("%d connections were made anew", got)
	}
}
