"""What an application sees: the OpenAI API, and the router that finds an executor for each request."""
