// The npm package openai: both APIs, plain and streamed, tools, structured output, refusals.
import assert from "node:assert/strict";
import OpenAI from "openai";

const { CLIENT_URL: baseURL, CLIENT_KEY: apiKey, CLIENT_MODEL: model } = process.env;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "The for statement" }];
const schema = {
  type: "object",
  properties: { city: { enum: ["Rome", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};
const called = {
  model, messages, max_tokens: 600, tool_choice: "required", parallel_tool_calls: false,
  tools: [{ type: "function", function: { name: "weather", parameters: schema } }],
};
const cityOf = (call) => JSON.parse(call.function.arguments).city;

const short = { model, messages, max_tokens: 8, temperature: 0 };
const whole = await client.chat.completions.create(short);
let text = "", usage;
for await (const chunk of await client.chat.completions.create({ ...short, stream: true, stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(usage.completion_tokens, 8);

for (const answer of [
  await client.chat.completions.create(called),
  await client.chat.completions.stream(called).finalChatCompletion(),
]) {
  assert.equal(answer.choices[0].finish_reason, "tool_calls");
  const [call] = answer.choices[0].message.tool_calls;
  assert.ok(schema.properties.city.enum.includes(cityOf(call)));
  const told = [...messages, answer.choices[0].message, { role: "tool", tool_call_id: call.id, content: "21 °C" }];
  assert.ok((await client.chat.completions.create({ ...short, messages: told })).choices[0].message.content);
}

const form = { type: "json_schema", json_schema: { name: "place", strict: true, schema } };
const parsed = await client.chat.completions.parse({ model, messages, max_tokens: 600, response_format: form });
assert.ok(schema.properties.city.enum.includes(parsed.choices[0].message.parsed.city));

assert.ok((await client.responses.create({ model, input: "x", max_output_tokens: 8 })).output_text);
const stream = client.responses.stream({ model, input: "x", max_output_tokens: 8 });
assert.equal((await stream.finalResponse()).status, "incomplete");
assert.ok((await client.completions.create({ model, prompt: "The for", max_tokens: 8 })).choices[0].text);
assert.deepEqual((await client.models.list()).data.map((each) => each.id), [model]);

const stranger = new OpenAI({ baseURL, apiKey: "no", maxRetries: 0 });
await assert.rejects(client.embeddings.create({ model, input: "x" }), OpenAI.NotFoundError);
await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
await assert.rejects(client.chat.completions.create({ ...short, model: "no" }), OpenAI.NotFoundError);
const long = [{ role: "user", content: "for ".repeat(9000) }];
await assert.rejects(client.chat.completions.create({ ...short, messages: long }), OpenAI.BadRequestError);
